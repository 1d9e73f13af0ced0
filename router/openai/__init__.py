"""The HTTP front, in the form of OpenAI's API: an adapter around :class:`router.service.InferenceService`.

requests   bodies that clients may send            translate   into messages of the gRPC contract
answers    bodies that clients get back            assemble    from messages of the gRPC contract
errors     statuses and error bodies               document    the OpenAPI document of all of it
app        routes, reading, streaming              messages    what requests share
"""
