"""Tables, figures and one page from all runs that are found, and plans of runs to come."""
