"""What lies between the layers and vLLM: the caches of a layer, their specs, the metadata of a step, the backend."""
