"""`opd serve-teacher`: one frozen model behind HTTP, whose hidden states let any divergence stay exact on another machine."""
