"""The paper's benchmark, whose photos and prompts are Meta-PHD. Its commands, and their files:

run: the protocol for many people, benchmark.py (which trains by family/side_by_side.py)
check: which photos and prompts may be used, admission.py
study: the user study, user_study.py
"""
