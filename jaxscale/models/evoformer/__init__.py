"""Blocks of the Evoformer, on an alignment of sequences and a tensor of pairs of residues.

Source: Jumper et al. 2021, AlphaFold 2 (doi 10.1038/s41586-021-03819-2), supplement, section 1.6;
    with the attention of Song et al. 2023, DeepSpeed4Science (arXiv 2310.04610).
"""
