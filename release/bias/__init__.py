"""Exact bias and variance of credit estimators on small decision processes."""
