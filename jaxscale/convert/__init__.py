"""Models of Hugging Face in and out: configurations, names and weights, one small file a family."""
