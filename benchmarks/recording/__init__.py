"""The records of samples: what they cost a step."""
