"""Learning from preferences: reward models and DPO, as in DeepSpeed-Chat (arXiv 2308.01320)."""
