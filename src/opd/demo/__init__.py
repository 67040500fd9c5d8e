"""What `opd demo` needs and a real run has already: a task, a teacher that was trained on it, a student that was badly taught."""
