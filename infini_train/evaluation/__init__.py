"""What a trained model makes of long text: loss by segment, and tasks for lm-evaluation-harness."""
