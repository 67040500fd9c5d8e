"""Everything in verl that opd relies on, the check that it is there, and the doctor that says so."""
