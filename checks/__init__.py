"""What proves a build or a machine: the compile table, the GPU check, soak and fault tests."""
