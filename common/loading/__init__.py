"""The same batches for any number of workers, any number of processes and after any restart."""
