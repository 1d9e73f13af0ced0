"""A request enters, tokens leave: validation, choice of workers, dispatch and the stream back to the client."""
