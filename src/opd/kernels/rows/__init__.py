"""Row passes: four ways to get a loss and its gradient from rows of logits. They do not import each other."""
