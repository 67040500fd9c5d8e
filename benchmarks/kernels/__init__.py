"""The loss from hidden states: time, peak memory and error, beside other libraries."""
