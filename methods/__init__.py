"""Methods: one file, or one folder, each. The file name is the method's name everywhere."""
