"""The same losses inside other people's trainers."""
