"""Training: `transformers.Trainer` with several views, objectives over the joint batch and online probes."""
