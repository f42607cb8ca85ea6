"""The Language Model Evaluation Harness over committed packed caches (`pip install -e .[harness]`).

`adapter` is the model that the harness asks, `local_tasks` are tasks over files in place of the hub's, `measuring` runs
tasks under several methods, `command` is `python main.py harness`. The harness is imported where it is used: all else
works without it.
"""
