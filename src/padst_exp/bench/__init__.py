"""How fast sparse layers and models are beside dense ones: `python -m padst_exp.bench suite=...`.

`choices` reads from conf/ what is measured, `contenders` and `models` build what takes turns,
`session` times it and makes rows, `tables` turns rows into CSV, figures and a README, `payoff`
answers for one layer.
"""
