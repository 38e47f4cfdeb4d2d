"""Opening diffusion models: the zoo, the Hub, folders and live pipelines; and running them traced."""
