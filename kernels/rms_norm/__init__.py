"""RMSNorm together with the residual that it is taken of."""
