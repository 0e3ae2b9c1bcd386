"""Learning from preferences: DPO, which DeepSpeed-Chat (arXiv 2308.01320) has beside PPO."""
