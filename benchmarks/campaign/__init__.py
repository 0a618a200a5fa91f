"""What `gpu_campaign.py` is made of.

`units` says what there is to do, `state` what is done, `runner` runs one unit in a process of its own and `store` keeps
its results; all four are plain Python, so that they run where nothing else does. The other modules are the units'
processes: `python -m campaign.NAME --result FILE ...`, each of which reports through `child`.
"""
