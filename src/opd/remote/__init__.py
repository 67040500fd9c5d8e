"""HTTP to servers of models: one pool of addresses, with retries, time limits, breakers and keys. It knows nothing of what is asked."""
