"""One accelerator group's work: model, pages, scheduler, sampler. Knows no network."""
