"""A step in several processes beside the same step in one."""
