"""How fast sparse layers and models are beside dense ones: `python -m padst_exp.bench suite=...`.

One file for each suite; what they share is in `timing`, `environment`, `roofline`, `dense`,
`peers`, `configurations`, `accuracy`, `report` and `plots`.
"""
