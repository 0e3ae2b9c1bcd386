"""RMSNorm beside the residual that it is taken of."""
