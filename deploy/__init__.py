"""The composition root: the Serve application, the local cluster and the command line."""
