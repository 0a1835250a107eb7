"""From a request to text: directory, chain, links, session, tokens."""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Mapping,
    Sequence,
)
from contextlib import ExitStack, asynccontextmanager

import trio

from shardmesh.coordinator.audit import Transcript
from shardmesh.coordinator.auditor import Auditor
from shardmesh.coordinator.chain import Chain, Replica, choose_model, pinned
from shardmesh.coordinator.draft_model import open_draft_model
from shardmesh.coordinator.embed import (
    EMBEDDING_TOKENS,
    UNUSED_SAMPLING,
    Embedding,
    embed_tokens,
)
from shardmesh.coordinator.generate import Finished, Piece, generate
from shardmesh.coordinator.grammar_proofs import GrammarProofs
from shardmesh.coordinator.linked_chain import ChainLinker, LinkedChain, Wish
from shardmesh.coordinator.model_files import ModelFiles, OpenModel
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.coordinator.pace import Explanation
from shardmesh.coordinator.prefixes import prefix_of
from shardmesh.coordinator.repairs import Repair
from shardmesh.coordinator.replacements import ReplicaFinder
from shardmesh.coordinator.request import (
    WAIT_S_DEFAULT,
    CompletionRequest,
    context_needed,
    plain_chat,
    sampling_message,
    uses_history,
)
from shardmesh.coordinator.router import SessionRouter
from shardmesh.coordinator.session import Session
from shardmesh.coordinator.stops import StopScanner
from shardmesh.engine.text import TextDecoder
from shardmesh.engine.tokenizer import Tokenizer
from shardmesh.errors import IncompleteError, InputError
from shardmesh.links.dial import Agree, LinkPool
from shardmesh.wire.announcement import Announcement
from shardmesh.wire.limits import EMBEDDING_TEXTS_MAX, PROMPT_BYTES_MAX
from shardmesh.wire.messages import Sampled

logger = logging.getLogger(__name__)

FindListeners = Callable[[], Awaitable[list[Announcement]]]


@dataclasses.dataclass(frozen=True)
class Completion:
    """A running completion: what was decided, and the items as they come."""

    session: Session
    n_prompt_tokens: int
    items: AsyncIterator[Piece | Finished]
    tokenizer: Tokenizer  # until the block is left
    explanation: Explanation | None = None  # why the chain was chosen
    prompt: Sequence[int] = ()  # its tokens
    prompt_scores: Sequence[Sampled] = ()  # but of the first; once text comes, if asked for
    can_roll_back: bool = True  # False: this architecture allows neither drafts nor reused prompts

    @property
    def chain(self) -> Chain:
        """The chain as it is now; a stage that failed has been replaced in it."""
        return self.session.chain

    @property
    def standbys(self) -> Mapping[int, Replica]:
        """Replicas that keep a copy of the KV now, by number of the stage."""
        return self.session.standbys.ready() if self.session.standbys is not None else {}

    @property
    def repairs(self) -> Sequence[Repair]:
        """The stages that were replaced so far."""
        return self.session.repairs


class Coordinator:
    """Answers requests with whatever chain the mesh has; several at once."""

    def __init__(
        self,
        find: FindListeners,
        agree: Agree,
        models: ModelFiles,
        nursery: trio.Nursery,
        *,
        known: Callable[[], list[Announcement]] | None = None,
        refresh: Callable[[], Awaitable[None]] | None = None,
        prefix_secret: bytes | None = None,
        audit_rate: float = 0.0,
    ) -> None:
        """`find` looks for listeners before a request.

        Coordinators with the same `prefix_secret`, of 32 bytes, begin behind each other's prompts.

        While a chain is repaired, `known` gives those that are known without asking anybody, and
        `refresh` asks a neighbour for news; without them what was found last must do.
        `audit_rate` is the share of sessions, 0 to 1, that is computed again by other replicas.
        """
        self._find = find
        self._nursery = nursery
        self._models = models
        self._router = SessionRouter()
        self._pool = LinkPool(nursery, agree, self._router)
        self._chains = ChainLinker(self._pool, self._router.n_sessions_by_peer)
        self._found: list[Announcement] = []
        self._replicas: list[Replica] = []  # what was found, as the chooser sees it
        self._known = known or (lambda: self._found)
        self._refresh = refresh or trio.lowlevel.checkpoint
        self._grammars = GrammarProofs()
        self._prefix_secret = prefix_secret or secrets.token_bytes(32)
        self.auditor = Auditor(
            audit_rate,
            nursery,
            open_session=self._open_on,
            distrust=self._chains.distrust,
        )

    @property
    def n_sessions(self) -> int:
        return self._router.n_sessions

    def round_trips_us(self) -> dict[str, int]:
        """Over the links to stages that are open now, by peer id."""
        return self._pool.round_trips_us()

    @asynccontextmanager
    async def complete(self, request: CompletionRequest) -> AsyncIterator[Completion]:
        """A completion whose session is closed on all stages when the block is left.

        A stage that fails meanwhile is replaced.  With `request.given` a text goes on whose
        coordinator is gone.  Raises InputError (theirs), IncompleteError,
        BusyError or UnreachableError (the moment's) and whatever a stage reports; so does iterating
        over the items.
        """
        started_s = trio.current_time()
        stops = StopScanner(request.stop)
        wish = Wish(request.model, request.via, request.avoid)
        async with self._prepared(request, wish) as (linked, model, prompt):
            chain = linked.chain
            n_ctx = context_needed(len(prompt), request.n_tokens_max, chain.n_ctx)
            settings = _settings_of(request, prompt, n_ctx, model, self._prefix_secret)
            finder = self._finder(wish, request.wait_s)
            scores, results = list[Sampled](), list[Sampled]()
            # With more rows of output the last bits may be others than an audit's.
            is_due = self.auditor.is_due() and not request.score_prompt
            n_drafts = request.n_drafts if model.manifest.can_roll_back else 0
            async with (
                open_draft_model(request.draft_model, model.tokenizer, n_drafts) as ask_model,
                self._router.session(chain, linked.links, settings, finder) as session,
            ):
                self._chains.link_spares(linked)
                if session.standbys is not None:
                    self._nursery.start_soon(session.standbys.run)
                items = generate(
                    session,
                    prompt,
                    n_tokens_max=n_ctx - len(prompt),
                    source=model.tokenizer,
                    decoder=TextDecoder(),
                    stops=stops,
                    ignore_end=request.ignore_end,
                    given=request.given,
                    n_drafts=n_drafts,
                    ask_model=ask_model,
                    scores=scores if request.score_prompt else None,
                    started_s=started_s,
                )
                noted = _noting(items, results)
                try:
                    yield Completion(
                        session,
                        len(prompt),
                        noted,
                        model.tokenizer,
                        linked.explanation,
                        prompt,
                        scores,
                        model.manifest.can_roll_back,
                    )
                finally:
                    await noted.aclose()
                    await items.aclose()
            if is_due and results and not session.repairs and not request.given:
                whole = Transcript(session.chain, settings, tuple(prompt), tuple(results))
                self.auditor.start(whole, self._allowed(wish))

    async def embed(
        self, texts: Sequence[str | Sequence[int]], *, model: str | None = None
    ) -> list[Embedding]:
        """The embeddings of texts, or of what is tokens already, one after the other.

        Raises what `complete` raises, and InputError (theirs) for a text without tokens, or one
        longer than the context or than the model's kind of pooling can take.
        """
        if not 1 <= len(texts) <= EMBEDDING_TEXTS_MAX:
            raise InputError(f"give 1 to {EMBEDDING_TEXTS_MAX} texts, not {len(texts)}")
        embeddings = []
        wish = Wish(model)
        linked = await self._link(wish)
        chain, links = linked.chain, linked.links
        async with self._models.use(chain.stages) as opened:
            for text in texts:
                tokens = await trio.to_thread.run_sync(_text_tokens, opened, text)
                n_ctx = context_needed(len(tokens), 0, chain.n_ctx)
                settings = SessionSettings(
                    n_ctx=n_ctx,
                    sampling=sampling_message(UNUSED_SAMPLING),
                    piece_tokens=EMBEDDING_TOKENS,
                )
                finder = self._finder(wish, WAIT_S_DEFAULT)
                async with self._router.session(chain, links, settings, finder) as session:
                    embeddings.append(await embed_tokens(session, tokens))
                chain, links = session.chain, session.links
        return embeddings

    @asynccontextmanager
    async def open_model(self, model_name: str | None) -> AsyncIterator[OpenModel]:
        """The tokenizer and template of a model, be its pipeline complete or not.

        Raises InputError (theirs) for a model that nobody serves or that must be named, and
        UnreachableError (the moment's) if nobody hands over the tokenizer.
        """
        replicas = [replica_of(announcement) for announcement in await self._find()]
        async with self._models.use(choose_model(replicas, model_name)) as model:
            yield model

    def _allowed(self, wish: Wish) -> list[Replica]:
        """The replicas that a request may use, as far as is known now."""
        known = (replica_of(announcement) for announcement in self._known())
        trusted = [replica for replica in known if self._chains.is_trusted(replica.peer_id)]
        try:
            return pinned(trusted, via=wish.via, avoid=wish.avoid)
        except InputError:  # one that was named is gone
            return []

    @asynccontextmanager
    async def _open_on(self, chain: Chain, settings: SessionSettings) -> AsyncIterator[Session]:
        links = await self._chains.links_of(chain)
        async with self._router.session(chain, links, settings) as session:
            yield session

    @asynccontextmanager
    async def _prepared(
        self, request: CompletionRequest, wish: Wish
    ) -> AsyncIterator[tuple[LinkedChain, OpenModel, list[int]]]:
        """A linked chain, its model, open until the block is left, and the prompt's tokens."""
        linked = await self._link(wish)
        with ExitStack() as preparing:
            preparing.enter_context(self._chains.reserve(linked.chain))
            async with self._models.use(linked.chain.stages) as model:
                prompt = await trio.to_thread.run_sync(_prompt_tokens, model, request)
                if request.sampling.grammar and model.tokenizer.has_text:
                    await self._grammars.prove(request.sampling.grammar, model.vocabulary_path)
                preparing.close()  # from now on the session itself is counted
                yield linked, model, prompt

    async def _link(self, wish: Wish) -> LinkedChain:
        try:
            return await self._link_found(wish)
        except IncompleteError:
            # A node that has just loaded its shard may not have told everybody yet.
            await self._refresh()
            return await self._link_found(wish)

    async def _link_found(self, wish: Wish) -> LinkedChain:
        self._found = await self._find()
        self._replicas = [replica_of(announcement) for announcement in self._found]
        return await self._chains.link(self._replicas, wish)

    def _finder(self, wish: Wish, timeout_s: float) -> ReplicaFinder:
        found = self._replicas
        allowed = {replica.peer_id for replica in pinned(found, avoid=wish.avoid)}
        return self._chains.finder(
            lambda: [replica_of(announcement) for announcement in self._known()],
            self._refresh,
            timeout_s,
            frozenset(r.peer_id for r in found if r.peer_id not in allowed),
        )


async def _noting(
    items: AsyncIterator[Piece | Finished], results: list[Sampled]
) -> AsyncGenerator[Piece | Finished, None]:
    """Hands items on and keeps what was sampled."""
    async for item in items:
        if isinstance(item, Piece) and item.token is not None:
            results.append(item.token)
        yield item


def replica_of(announcement: Announcement) -> Replica:
    """An announcement as the chooser of chains sees it."""
    return Replica(
        peer_id=announcement.peer_id,
        addresses=announcement.addresses,
        model_name=announcement.model_name,
        manifest_digest=announcement.manifest_digest,
        shard_id=announcement.shard_id,
        layer_start=announcement.layer_start,
        layer_end=announcement.layer_end,
        n_layer=announcement.total_layers,
        n_ctx=announcement.capabilities.n_ctx,
        shard_loaded=(
            announcement.capabilities.shard_loaded and not announcement.capabilities.is_draining
        ),
        fingerprint=announcement.engine_fingerprint,
        n_parallel=announcement.capabilities.n_parallel,
        n_sessions=announcement.capabilities.n_sessions,
        token_us=announcement.capabilities.token_us,
        round_trips_us=announcement.capabilities.round_trips_us,
    )


def _prompt_tokens(model: OpenModel, request: CompletionRequest) -> list[int]:
    if request.prompt is not None:
        return model.tokenizer.encode(request.prompt)
    if request.prompt_tokens:
        return list(request.prompt_tokens)
    if request.plain_chat and not model.tokenizer.chat_template:
        return model.tokenizer.encode(plain_chat(request.messages))
    return model.encode_chat(request.messages, **request.template_variables)


def _settings_of(
    request: CompletionRequest,
    prompt: Sequence[int],
    n_ctx: int,
    model: OpenModel,
    prefix_secret: bytes,
) -> SessionSettings:
    """What the stages are told of a session for this prompt."""
    sampling = sampling_message(request.sampling)
    n_history = sampling.repeat_last_n if uses_history(request.sampling) else 0
    return SessionSettings(
        n_ctx=n_ctx,
        sampling=sampling,
        piece_tokens=model.manifest.piece_tokens,
        n_vocab=model.tokenizer.n_vocab,
        history=tuple(prompt[-n_history:] if n_history else ()),
        adapter=request.adapter,
        wire=request.wire,
        prefix=prefix_of(prompt, request, model.manifest, prefix_secret),
        standby=request.standby and model.manifest.can_roll_back,
        hands_on=model.manifest.can_roll_back,
    )


def _text_tokens(model: OpenModel, text: str | Sequence[int]) -> list[int]:
    if not isinstance(text, str):
        return list(text)
    if len(text) > PROMPT_BYTES_MAX:
        raise InputError(
            f"a text has more than {PROMPT_BYTES_MAX} characters", code="PROMPT_TOO_LONG"
        )
    return model.tokenizer.encode(text)
