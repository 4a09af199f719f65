"""What runs can be asked afterwards: costs, graphs of masks, permutations, linear regions."""
