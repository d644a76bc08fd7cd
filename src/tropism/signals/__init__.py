"""What is measured on a finished batch, without gradient."""
