"""From rollouts or rows to new weights: collate, measure, update, checkpoint."""
