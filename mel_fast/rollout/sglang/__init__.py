"""SGLang servers as the rollout engine, over HTTP.

config    the settings
keeper    a process group that ends with its parent
process   launching one server
client    the HTTP calls
gate      who goes first, so that no prefix is computed twice
server    one server: alive, lost, restored
transport, group, receivers, publisher   the policy's weights to the servers
engine    all servers together: placement, publication, faults

SGLang is never imported here. It lives in an environment of its own (`make sglang`) or on another host.
"""
