"""FPDT: a layer over one chunk of a sequence at a time, what the others need resting on the host.

Source: Yao et al. 2024, FPDT, also Ulysses-Offload (arXiv 2408.16978).
"""
