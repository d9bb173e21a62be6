"""Evaluation of trained models on long text: loss by segment, recall, and tasks for lm-evaluation-harness."""
