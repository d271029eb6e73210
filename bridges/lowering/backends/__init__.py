"""What turns pieces of a program into calls; `pipeline` says which runs when."""
