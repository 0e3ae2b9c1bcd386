"""Learning from preferences and rewards, as in DeepSpeed-Chat (arXiv 2308.01320): reward models,
DPO, GRPO and PPO.
"""
