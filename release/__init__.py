"""What is given to others: the wheel, and the folder for the Hugging Face kernels hub."""
