"""Every limit of the protocols, with its reason.  One past a limit is a ProtocolError."""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

# -- structure ---------------------------------------------------------------------------------

NESTING_MAX: Final = 16
"""Depth of containers in CBOR and JSON; our deepest message has 5."""

TEXT_BYTES_MAX: Final = 4 * KIB
"""A name, an address or an error sentence; the prompt has a limit of its own."""

# -- frames on a link --------------------------------------------------------------------------

FRAME_HEADER_BYTES_MAX: Final = 256 * KIB
"""CBOR header of a frame; the largest is a micro-batch of token ids with logit biases."""

FRAME_BODY_BYTES_MAX: Final = 64 * MIB
"""Tensor bytes of a frame: 1,024 rows of the widest known model (n_embd 16,384) in f32."""

EMBEDDING_TEXTS_MAX: Final = 2048
"""Texts of one request for embeddings; as many as the well-known HTTP interface takes."""

EMBEDDING_BYTES_MAX: Final = 128 * KIB
"""An embedding, in the header of a frame: 32,768 numbers, twice the widest known model."""

ADAPTERS_MAX: Final = 16
"""LoRA adapters of one model; each has a file for each shard, and all are loaded."""

MICRO_BATCH_TOKENS_MAX: Final = 1024
"""Rows of one micro-batch; larger ones would only delay the next stage."""

PIECE_TOKENS_MIN: Final = 16
"""Tokens of a piece of a prompt at least: with fewer, hops would take longer than computing."""

PIECE_TOKENS_MAX: Final = 512
"""Tokens of a piece of a prompt at most: the rows that engines have memory for in one pass."""

PIECE_BYTES_MAX: Final = 16 * MIB
"""Hidden states of a piece: eight, which a session keeps under way, fill the queue of a link."""

# -- sessions ----------------------------------------------------------------------------------

SEQUENCES_MAX: Final = 256
"""Sequences of one llama.cpp context (LLAMA_MAX_SEQ)."""

SESSIONS_PER_NODE_MAX: Final = 128
"""Sequences of a stage that one coordinator may use at once: half of what there can be."""

SAMPLING_HISTORY_TOKENS_MAX: Final = 4096
"""Prompt tokens that the penalties of the sampler may look back on."""

PREFIX_PIECES_MAX: Final = 4096
"""Pieces of a prompt that may be reused; their names take 90 KiB of a frame's header."""

LOGIT_BIASES_MAX: Final = 1024
"""Entries of a logit bias; OpenAI allows 300."""

SCORED_TOKENS_MAX: Final = 64
"""Tokens of one micro-batch whose log-probabilities are given; 60 KiB with 64 alternatives each."""

TOP_LOGPROBS_MAX: Final = 64
"""Alternatives reported for a token; OpenAI allows 20."""

SESSION_BATCHES_WAITING_MAX: Final = 64
"""Micro-batches of one session that wait in a stage; a coordinator keeps 8 under way."""

DRAFT_KEY_BYTES: Final = 16
"""The key of the checks of drafts, new for each session; BLAKE2b takes any length up to 64."""

DRAFT_CHECK_BYTES: Final = 8
"""A draft's check: one wrong draft in 2**64 would pass."""

DRAFTS_MAX: Final = 32
"""Drafts of a session whose tokens are not known yet; half of what may wait in a stage."""

HANDED_AHEAD_MAX: Final = 16
"""Tokens that the last stage handed on and the coordinator has not sent: then it does not read."""

BRANCHES_TOLD_MAX: Final = 64
"""Branches that a repair names; a stage has missed at most one for each draft under way."""

REPLAY_KEPT_BYTES_MAX: Final = 512 * MIB
"""What a stage keeps of what it sent, over all its sessions; 32,768 tokens at n_embd 4,096."""

REPLAY_RESULTS_KEPT_MAX: Final = 64
"""Results that a last stage keeps of a session; the coordinator lacks the last few at most."""

KV_COPY_BYTES_MAX: Final = 4 * MIB
"""KV in one frame to a standby, and so of one position: the widest known model has 2.6 MiB."""

KV_COPY_WINDOW_BYTES: Final = 2 * MIB
"""KV on its way to a standby and not acknowledged: what sessions wait for goes on between."""

COPIED_STATE_BYTES_MAX: Final = 512 * MIB
"""A sequence's KV that is copied: llama.cpp hands it over at once, which delays tokens by 0.1 s."""

COPIES_BYTES_MAX: Final = 1024 * MIB
"""KV that a stage keeps for others, as their standby: two of the largest, or some dozens."""

COPIES_MAX: Final = 64
"""Sessions that a stage stands by for."""

REPLAY_BATCHES_IN_FLIGHT_MAX: Final = 16
"""Micro-batches replayed to a stage and not acknowledged: other sessions share link and engine."""

DECODE_ROUND_MAX: Final = 32
"""Single tokens of different sessions that a stage computes before a prompt gets its turn."""

# -- commands ----------------------------------------------------------------------------------

COMMAND_BYTES_MAX: Final = 4 * MIB
"""A JSON request: a prompt of a million characters and room for its escapes."""

COMMAND_RESPONSE_BYTES_MAX: Final = 16 * MIB
"""A JSON answer: LIST_FILES of 10,000 files, or a long text with its log-probabilities."""

PROMPT_BYTES_MAX: Final = 1 * MIB
"""A prompt; the context of a model is far smaller in nearly all cases."""

CHAT_MESSAGES_MAX: Final = 1024
"""Messages of one conversation."""

STOP_STRINGS_MAX: Final = 64
"""Stop strings of one request; OpenAI allows 4."""

# -- announcements -----------------------------------------------------------------------------

ANNOUNCEMENT_BYTES_MAX: Final = 8 * KIB
"""One signed announcement: 16 addresses of 256 bytes and the capabilities."""

ANNOUNCEMENT_ADDRESSES_MAX: Final = 16
"""Addresses in an announcement; a dialer tries each in turn."""

ROUND_TRIPS_MAX: Final = 16
"""Round trips to other nodes in an announcement; a stage has few neighbours, each takes 60 B."""

LOAD_INTERVAL_S: Final = 1.0
"""How often a node tells its neighbours at most that its load has changed."""

ANNOUNCEMENT_LIFETIME_MAX_S: Final = 600
"""An announcement is believed for ten minutes at most, twice the refresh interval."""

ANNOUNCEMENT_CLOCK_SKEW_MAX_S: Final = 120
"""How far the clock of another machine may be ahead."""

DIRECTORY_ENTRIES_MAX: Final = 1000
"""Announcements that a node remembers or hands over; a mesh has some hundred nodes at most."""

# -- time --------------------------------------------------------------------------------------

HANDSHAKE_TIMEOUT_S: Final = 5.0
"""From accepting a connection to its first authenticated frame; longer is a slow loris."""

HEARTBEAT_INTERVAL_S: Final = 0.25
"""A link says that it is alive this often, so that a stopped process is suspected quickly."""

SILENCE_SUSPECTED_S: Final = 0.8
"""Silence on a steady link after which a session goes on elsewhere: three heartbeats missed."""

HEARTBEAT_TIMEOUT_S: Final = 10.0
"""Silence on a link after which it is closed."""

WRITE_TIMEOUT_S: Final = 30.0
"""A frame that cannot be handed to the network for so long: the reader is gone."""

WRITE_BYTES_PER_S_MIN: Final = 64 * KIB
"""The slowest line: a frame has as much more time as it takes there; half a Mbit/s."""

COMMAND_TIMEOUT_S: Final = 10.0
"""A command that only reads; LOAD_SHARD and INFERENCE have deadlines of their own."""

LOAD_TIMEOUT_S: Final = 600.0
"""LOAD_SHARD: tens of GB from a slow disk."""

INFERENCE_TIMEOUT_S: Final = 600.0
"""INFERENCE: 4,000 tokens of a large model at 7 tokens/s."""

# -- links -------------------------------------------------------------------------------------

LINK_QUEUE_FRAMES_MAX: Final = 1024
"""Frames that wait to be written on one link; four for each sequence of a full context."""

LINK_QUEUE_BYTES_MAX: Final = 2 * FRAME_BODY_BYTES_MAX
"""Bytes that wait to be written on one link; two of the largest frames."""

LINKS_MAX: Final = 256
"""Links of one data process; each neighbour and each coordinator has one."""

FOLLOWING_LINKS_MAX: Final = 4
"""Nodes that one keeps links to in case its results go there; further links come up when needed."""

LINK_AGREEMENT_BYTES_MAX: Final = 8 * KIB
"""Request and offer of a link: keys, and up to 16 endpoints."""

EXPECTED_LINKS_MAX: Final = 64
"""Links that were offered and not yet dialed; they lapse after the handshake's time-out."""

EXPECTED_LINKS_PER_NODE_MAX: Final = 8
"""Links offered to one node and not yet dialed, so that one cannot take all the places."""

UNNAMED_CONNECTIONS_MAX: Final = 512
"""Accepted connections without a proven key; beyond it the address with most loses its oldest."""

LINK_STREAM_DELAY_S: Final = 1.0
"""Head start of a link's last direct endpoint before a libp2p stream is tried, which costs more."""

OPEN_FILES_MIN: Final = 4096
"""Open files that a node asks the system for: all its connections at once, and room."""

# -- members -----------------------------------------------------------------------------------

REMOVED_NODES_MAX: Final = 64
"""Peer ids that one change of the secret turns away; a later change needs not name them again."""

CLUSTER_UPDATE_BYTES_MAX: Final = 8 * KIB
"""A signed change of the secret: its text and 64 peer ids of 52 letters."""

# -- libp2p ------------------------------------------------------------------------------------

CONNECTIONS_MAX: Final = 512
"""Connections of a host; each costs a socket and four tasks."""

CONNECTIONS_PER_NODE_MAX: Final = 4
"""Connections with one node; two arise when both dial at once."""

HANDSHAKES_MAX: Final = 1024
"""Connections that have not shown who they are; beyond it the address with most loses one."""

FAILED_CONNECTIONS_MAX: Final = 100
"""Connections of one address that come to nothing in a period; further ones are closed at once."""

FAILED_CONNECTIONS_PERIOD_S: Final = 10.0
"""The period in which they are counted: ten a second is more than any node needs."""

FAILING_ADDRESSES_MAX: Final = 4096
"""Addresses whose failed connections are counted."""

REQUESTS_MAX: Final = 256
"""Requests that a host serves at once, all protocols together; beyond it is BUSY."""

REQUESTS_PER_NODE_MAX: Final = 64
"""Requests that a host serves at once for one node, so that one cannot take all the room."""

LASTING_STREAMS_MAX: Final = 256
"""Links and relayed connections that a host serves at once as streams, beside its requests."""

REQUEST_READ_TIMEOUT_S: Final = 10.0
"""From opening a stream to the end of its request."""

STREAM_OPEN_TIMEOUT_S: Final = 5.0
"""Agreeing on the protocol of a new stream."""

STREAM_CHUNK_BYTES: Final = 64 * KIB
"""What is read from or written to a stream in one step; one frame of Yamux."""

STREAM_READ_AHEAD_CHUNKS: Final = 4
"""Chunks read before they are asked for: 256 KiB, the first window of Yamux."""

DIAL_STAGGER_S: Final = 0.25
"""Head start of an address before the next one of the same node is tried too."""

DIAL_ADDRESSES_MAX: Final = 16
"""Addresses of a node that are tried."""

PING_INTERVAL_S: Final = 25.0
"""A quiet connection that is wanted is pinged this often, so that a stopped node is noticed."""

PING_TIMEOUT_S: Final = 5.0
"""A ping without an answer for so long closes the connection."""

LIVENESS_INTERVAL_S: Final = 3.0
"""The nodes of the directory are pinged this often, so that a stopped one is hidden in 10 s."""

LIVENESS_NODES_MAX: Final = 16
"""Connected nodes that are pinged so often; with more, each gets its turn more seldom."""

IDLE_TIMEOUT_S: Final = 60.0
"""A connection that nobody wants and nobody used for so long is closed."""

KNOWN_NODES_MAX: Final = 4096
"""Nodes whose addresses a host keeps in memory to dial them again."""

# -- discovery ---------------------------------------------------------------------------------

DHT_KEY_BYTES_MAX: Final = 50
"""py-libp2p finds nothing under longer keys."""

DHT_QUERY_TIMEOUT_S: Final = 3.0
"""One node's answer in a DHT operation; a stopped one delays the operation by so much."""

DHT_OPERATION_TIMEOUT_S: Final = 30.0
"""A whole DHT operation, which asks several nodes one after the other."""

DHT_PROVIDERS_MAX: Final = 20
"""Replicas that the DHT keeps under one key."""

DIRECTORY_PUSH_MAX: Final = 16
"""Announcements handed over in one request; a node pushes its own, seldom more."""

DIRECTORY_REQUEST_BYTES_MAX: Final = (DIRECTORY_PUSH_MAX + 1) * ANNOUNCEMENT_BYTES_MAX
"""A request to a directory: its announcements and a little around them."""

DIRECTORY_RESPONSE_BYTES_MAX: Final = (DIRECTORY_ENTRIES_MAX + 1) * ANNOUNCEMENT_BYTES_MAX
"""All that a directory can hold."""

DIRECTORY_PULL_INTERVAL_S: Final = 5.0
"""A neighbour's directory is asked for this often, so that what was missed comes in."""

DIRECTORY_NEWS_INTERVAL_S: Final = 0.03
"""Changes of so long are told together: a page is to show within 300 ms what happened."""

DIRECTORY_NEWS_HEARTBEAT_S: Final = 5.0
"""A directory that is followed says something at least this often."""

DIRECTORY_NEWS_SILENCE_MAX_S: Final = 15.0
"""After three heartbeats missed another neighbour's directory is followed."""

DIRECTORY_FOLLOW_PAUSE_S: Final = 0.5
"""Before another neighbour is tried whose directory can be followed."""

DIRECT_CONNECTIONS_MAX: Final = 32
"""Listeners that a listener connects with without a request."""

BOOTSTRAP_PAUSE_MIN_S: Final = 1.0
"""Before an unreachable bootstrap is tried again; it doubles each time."""

BOOTSTRAP_PAUSE_MAX_S: Final = 30.0
"""The longest such pause: a bootstrap that comes back is found within half a minute."""

NODE_TAGS_MAX: Final = 16
"""Tags of a node; with its name and location they take at most 1 KiB of an announcement."""

REMEMBERED_NODES_MAX: Final = 64
"""Nodes whose addresses are kept on disk for a start without a bootstrap."""

REMEMBERED_FILE_BYTES_MAX: Final = 512 * KIB
"""The file of remembered nodes: 64 nodes with 16 addresses each."""

# -- being reached -----------------------------------------------------------------------------

LAN_NODES_MAX: Final = 16
"""Nodes of the cluster that are remembered from the LAN; one that answers is enough."""

LAN_SEARCH_TIMEOUT_S: Final = 3.0
"""A client waits so long for an answer on the LAN; a person waits with it."""

LAN_SEARCH_INTERVAL_S: Final = 15.0
"""A node without neighbours tries again this often what the LAN has shown."""

DIAL_BACK_PORTS_MAX: Final = 4
"""Ports that a node asks to be dialed at: its own, and those that a router forwards to it."""

DIAL_BACKS_MAX: Final = 8
"""Nodes that are dialed back at once."""

DIAL_BACK_PAUSE_S: Final = 5.0
"""Between two requests of one node to be dialed back, so that nobody is made to dial in a row."""

REACH_INTERVAL_S: Final = 60.0
"""A node asks this often whether it can be reached: a changed router is noticed in a minute."""

REACH_OBSERVERS_MAX: Final = 4
"""Nodes that are asked to dial back in one round."""

RELAY_MESSAGE_BYTES_MAX: Final = 16 * KIB
"""A request to a relay or its answer; the largest lists its addresses."""

RELAY_ADDRESSES_MAX: Final = 8
"""Addresses that a relay tells of itself."""

RELAYS_PER_NODE_MAX: Final = 2
"""Relays that an unreachable node takes a place on; one may fail."""

RELAY_RESERVATION_S: Final = 300
"""A place on a relay lapses after so long; it is renewed before half of that is over."""

RELAY_RESERVATIONS_MAX: Final = 128
"""Places on one relay."""

RELAY_CIRCUITS_MAX: Final = 128
"""Connections that one relay carries at once; each costs two streams."""

RELAY_CIRCUITS_PER_NODE_MAX: Final = 16
"""Of them with one node at either end, so that one cannot take all the places."""

RELAY_BYTES_PER_S_MAX: Final = 16 * MIB
"""What one carried connection may take of the relay's line; more than 128 Mbit/s waits."""

# -- model files -------------------------------------------------------------------------------

GGUF_HEADER_BYTES_MAX: Final = 128 * MIB
"""All before a model's weights; the largest known vocabularies and merges take 30 MiB."""

GGUF_VALUES_MAX: Final = 65_536
"""Metadata entries of a model; real ones have fewer than 100."""

GGUF_TENSORS_MAX: Final = 65_536
"""Tensors of a model; 100 layers of 256 experts stored one by one would still fit."""

GGUF_NAME_BYTES_MAX: Final = 65_535
"""A metadata key, as the GGUF specification has it."""

GGUF_TENSOR_NAME_BYTES_MAX: Final = 63
"""A tensor's name: ggml keeps it in 64 bytes with a zero at the end."""

GGUF_STRING_BYTES_MAX: Final = 1 * MIB
"""One metadata string; long chat templates have 30 KiB."""

GGUF_ARRAY_ITEMS_MAX: Final = 4 * 1024 * 1024
"""Items of one metadata array; the longest known list of merges has 600,000."""

GGUF_DIMENSIONS_MAX: Final = 4
"""Dimensions of a tensor (GGML_MAX_DIMS)."""

GGUF_ALIGNMENT_MAX: Final = 65_536
"""Alignment of the weights; 32 is what everybody writes."""

GGUF_PARTS_MAX: Final = 1024
"""Files of one model; the largest models come in some 200."""

MODEL_LAYERS_MAX: Final = 512
"""Layers of a model (LLAMA_MAX_LAYERS), and so the most shards."""

STREAMS_MAX: Final = 64
"""Hidden states of a token side by side; models that have several have four."""

MODEL_NAME_BYTES_MAX: Final = 128
"""A model's name in manifests and announcements."""

MANIFEST_BYTES_MAX: Final = 1 * MIB
"""A manifest: 512 shards take some 150 KiB of JSON."""

SHARD_FILES_MAX: Final = 10_000
"""Files that a shard folder may hold; what lies beyond is not listed."""

# -- torrents ----------------------------------------------------------------------------------

TORRENT_BYTES_MAX: Final = 4 * MIB
"""A torrent: 32 bytes for each piece of 16 MiB of the largest file, and a little around them."""

TORRENT_NESTING_MAX: Final = 6
"""Depth of containers in a torrent; ours has 5."""

TORRENT_NAME_BYTES_MAX: Final = 255
"""A file's name in a torrent, as file systems have it."""

TORRENT_FILE_BYTES_MAX: Final = 2**40
"""A file in a torrent: 1 TiB, of which the hashes take 2 MiB."""

TORRENT_REQUEST_BYTES_MAX: Final = 1 * KIB
"""A request about a torrent or a published model: one hash and a little around it."""

TORRENT_RESPONSE_BYTES_MAX: Final = TORRENT_BYTES_MAX + 4 * KIB
"""The longest answer to such a request: a whole torrent."""

TORRENT_SOURCES_MAX: Final = 50
"""Nodes that a download is connected with at once."""

TORRENT_ASK_INTERVAL_MAX_S: Final = 15.0
"""A download asks the other nodes for pieces at least this often; at first every second."""

TORRENT_MEMBER_S: Final = 600.0
"""So long a member's address may connect after it was asked or has asked about a file."""

TORRENT_SEEDED_FILES_MAX: Final = 1000
"""Files that a node seeds; each costs some ten KiB of memory and a record in the DHT."""

MODEL_FOLDERS_MAX: Final = 256
"""Models side by side in one folder; what lies beyond is not looked at."""

MODEL_LINK_CHARS_MAX: Final = 2048
"""A model link: name, digest, key, and up to eight bootstraps."""

MODEL_LINK_BOOTSTRAPS_MAX: Final = 8
"""Bootstraps in a model link; the first that answers is enough."""

PUBLICATION_BYTES_MAX: Final = MANIFEST_BYTES_MAX + 64 * KIB
"""A signed manifest with its info-hashes: 512 shards take some 150 KiB."""

# -- text and chat templates -------------------------------------------------------------------

TOKEN_PIECE_BYTES_MAX: Final = 64 * KIB
"""The text of one token; the longest known has some hundred bytes."""

DECODED_TOKENS_MAX: Final = 4 * PROMPT_BYTES_MAX
"""Tokens decoded at once; a prompt of the allowed length has fewer."""

CHAT_TEMPLATE_CHARS_MAX: Final = 256 * KIB
"""A chat template; the longest known, with tools, have some 20,000 characters."""

CHAT_RENDERED_CHARS_MAX: Final = 4 * MIB
"""A rendered chat: the prompt limit, and room for what a template says about tools."""

CHAT_ANSWER_CHARS_MAX: Final = 12 * CHAT_RENDERED_CHARS_MAX + KIB
"""A rendered chat as a line of JSON: twelve characters where one has to be escaped."""

CHAT_RENDER_TIMEOUT_S: Final = 5.0
"""For the start of the process and one template; a usual one takes a few milliseconds."""

CHAT_PROCESS_BYTES_MAX: Final = 1024 * MIB
"""Memory of the process that runs templates; Python itself takes a tenth of it."""

# -- the gateway -------------------------------------------------------------------------------

HTTP_CONNECTIONS_MAX: Final = 4096
"""Connections of clients and pages; each costs a socket, three tasks and some 60 KiB."""

HTTP_HEADER_BYTES_MAX: Final = 32 * KIB
"""Request line and headers of an HTTP request; browsers send a few KiB."""

HTTP_KEEP_ALIVE_S: Final = 60.0
"""A quiet HTTP connection is closed after so long; a quiet WebSocket is pinged then."""

WEBSOCKET_MESSAGE_BYTES_MAX: Final = 64 * KIB
"""A message from a page to the gateway; it only says what it wants to see."""

EVENTS_WAITING_MAX: Final = 1024
"""Events that a reader of the gateway has not taken yet; beyond it misses some and is told."""

HTTP_BODY_BYTES_MAX: Final = 4 * MIB
"""The body of an HTTP request: a prompt of a million characters and room for its escapes."""

HTTP_BODY_TIMEOUT_S: Final = 30.0
"""From the headers of a request to the end of its body; longer is a slow loris."""

REQUESTS_WAITING_MAX: Final = 128
"""Sessions of one model that wait for a place in the gateway; beyond it is BUSY."""

REQUEST_QUEUE_TIMEOUT_S: Final = 120.0
"""For a place; most clients would have given up by then."""

CHOICES_MAX: Final = 32
"""Answers of one request: prompts times `n`, each a session of its own."""

TOOLS_MAX: Final = 128
"""Tools of one request, as OpenAI allows."""

GRAMMAR_BYTES_MAX: Final = 64 * KIB
"""A grammar for the sampler; with the logit biases it fits into the header of one frame."""

GRAMMAR_GROUPS_MAX: Final = 64
"""Groups inside of each other in a grammar: llama.cpp's parser calls itself for each."""

GRAMMAR_WORK_TIMEOUT_S: Final = 10.0
"""For making a grammar of a JSON schema, or trying one, in a process that has to start first."""

GRAMMAR_STEP_TIMEOUT_S: Final = 10.0
"""For the last stage to open a grammar, or to find a token that it allows: mostly milliseconds."""

ENGINE_CALL_TIMEOUT_S: Final = 120.0
"""For one computation: 64 tokens through a large shard of a slow machine take tens of seconds."""

API_TOKENS_MAX: Final = 1024
"""API tokens of one gateway; each request is held against all of them."""

RATE_CALLERS_MAX: Final = 4096
"""Callers whose rate a gateway remembers; the one that was quiet for longest is forgotten."""
