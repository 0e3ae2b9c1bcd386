"""Learning from preferences: DPO, which the code of DeepSpeed-Chat (arXiv 2308.01320) has too."""
