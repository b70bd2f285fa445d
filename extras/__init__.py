"""What hangs on the four modules from outside, one concept a file; README.md lists them."""
