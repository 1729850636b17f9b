"""What a model may call here, on this machine: `base` says what a tool is, each other module is one."""
