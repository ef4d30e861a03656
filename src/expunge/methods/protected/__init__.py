"""Protected methods: they act before or during training, so that later requests are cheap."""
