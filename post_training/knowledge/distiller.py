"""What a student learns of its teacher: at trained tokens the distribution of the next, and hidden states.

    loss of a token = cross-entropy (without skip_lm_loss)
                      + kd_loss_scale * (KL(teacher || student) + intermediate_loss_scale * mean of pairs)

The weights are fixed and each trained token weighs the same: ModelOpt's balancer scales by the losses of a
micro batch, so that its results depend on the layout. The teacher is online, a model beside the student, or
offline: its top tokens, stored with the documents.

On pipeline stages the teacher's states travel behind the student's, [sequence, micro batch, both hidden
sizes], as in ModelOpt's plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor
from torch.nn import functional

from post_training.batch.assemble import Batch, join_stage_input
from post_training.batch.trained_tokens import TrainedTokens
from post_training.distillation.features import OF_STUDENT
from post_training.distillation.losses import (
    TopTokens,
    divergence,
    keep_output,
    sparse_divergence,
    top_tokens,
)
from post_training.knowledge.settings import KnowledgeSettings
from post_training.metrics.step_counters import counters
from post_training.training.loss import trained_logits


def knowledge_parts(settings: KnowledgeSettings) -> list[str]:
    """What `Distiller` counts apart; `lm_loss` is the cross-entropy in any case."""
    hidden = ["kd_hidden_loss"] if settings.pairs else []
    return ["kd_total_loss", "kd_logits_loss", *hidden]


class Distiller:
    """Teaches one pipeline stage of a student; `install_distiller` puts it there."""

    def __init__(
        self, settings: KnowledgeSettings, vocabulary: int, student: Any, teacher: Any
    ) -> None:
        """Watch the layers whose states are compared.

        Args:
            settings: what is learned.
            vocabulary: tokens there really are.
            student: unwrapped.
            teacher: likewise, frozen; None: what is stored with the documents.
        """
        self.settings = settings
        self.vocabulary = vocabulary
        self.student = student
        self.teacher = teacher
        self.lm: Tensor | None = None
        """Cross-entropies of the micro batch, on the last stage: float32 [trained]."""
        self._trained: TrainedTokens
        self._taught: Tensor | TopTokens
        self._states: Tensor
        self._seen: dict[tuple[int, int], Tensor] = {}
        if student.post_process:
            for number, pair in enumerate(settings.pairs):
                for which, model, name in ((0, student, pair.student), (1, teacher, pair.teacher)):
                    keep_output(model.get_submodule(name), self._seen, (number, which))

    def begin(self, batch: Batch) -> None:
        """Hear the teacher on a micro batch, before the student's forward pass."""
        self._trained, self.lm = batch.trained, None
        if self.teacher is None:
            if self.student.post_process:
                self._taught = _stored(batch.features, batch.trained, self.vocabulary)
            return
        if not self.student.pre_process:
            join_stage_input(self.teacher)
        with torch.no_grad():
            output = self.teacher(
                *(batch.tokens, batch.position_ids, None),
                packed_seq_params=batch.packed,
                output_processor=self._teacher_logits,
                output_processor_context=batch.trained,
            )
        if not self.student.post_process:
            self._states = output
            return
        k = self.settings.logit_kl_topk
        group = self.teacher.output_layer.tp_group
        temperature = self.settings.logit_kl_temperature
        self._taught = output if k is None else top_tokens(output, k, group, temperature)

    def _teacher_logits(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: TrainedTokens,
        **unused: Any,
    ) -> Tensor:
        """[trained, vocabulary rows of this rank]; Megatron's cross-entropy never gets these."""
        return trained_logits(
            hidden_states, output_layer, output_weight, context, self.vocabulary
        ).squeeze(1)

    def teach(self, logits: Tensor, cross_entropy: Callable[[Tensor], Tensor]) -> Tensor:
        """The losses of trained tokens, as `trained_token_loss` wants them.

        Args:
            logits: the student's: [trained, 1, vocabulary rows of this rank].
            cross_entropy: of them; it overwrites them.

        Returns:
            float32 [trained].
        """
        settings, group = self.settings, self.student.output_layer.tp_group
        compare: Any = divergence if isinstance(self._taught, Tensor) else sparse_divergence
        own = logits.squeeze(1)
        of_logits: Tensor = compare(own, self._taught, group, settings.logit_kl_temperature)
        taught, parts = of_logits, [of_logits]
        if settings.pairs:
            of_pairs = [self._hidden_loss(number) for number in range(len(settings.pairs))]
            parts.append(torch.stack(of_pairs).mean(0))
            taught = taught + settings.intermediate_loss_scale * parts[-1]
            self._seen.clear()
        total = settings.kd_loss_scale * taught
        if settings.skip_lm_loss:
            with torch.no_grad():
                self.lm = cross_entropy(logits.detach())
        else:
            trained = cross_entropy(logits)
            self.lm, total = trained.detach(), total + trained
        weights = self._trained.weights
        sums = torch.stack([(part.detach() * weights).sum() for part in (total, *parts)])
        counters.add_parts(sums, weights.sum().expand(len(sums)))
        return total

    def _hidden_loss(self, number: int) -> Tensor:
        """Of one pair, float32 [trained], the same on all ranks of the tensor parallel group."""
        student, teacher = (self._chosen(self._seen[number, which]) for which in (0, 1))
        if self.settings.pairs[number].loss == "mse":
            return (student - teacher).square().mean(-1)
        return 1 - functional.cosine_similarity(student, teacher, dim=-1)

    def _chosen(self, states: Tensor) -> Tensor:
        """Of trained tokens: float32 [trained, hidden]."""
        if self.student.config.sequence_parallel:
            states = tensor_parallel.gather_from_sequence_parallel_region(
                states, tensor_parallel_output_grad=False, group=self.student.pg_collection.tp
            )
        return states.index_select(0, self._trained.indices).squeeze(1).float()

    def beside(self, output: Tensor) -> Tensor:
        """What an earlier stage sends: its own states and the teacher's, [tokens, 1, both hidden sizes]."""
        return output if self.teacher is None else torch.cat([output, self._states], dim=-1)

    def set_input_tensor(self, received: Any) -> None:
        """In the place of the student's own: part what the stage before has sent."""
        (tensor,) = received if isinstance(received, list) else [received]
        parts: Any = (None, None)
        if tensor is not None:
            sizes = [model.config.hidden_size for model in (self.student, self.teacher)]
            parts = [part.contiguous() for part in tensor.split(sizes, dim=-1)]
        type(self.student).set_input_tensor(self.student, parts[0])
        self.teacher.set_input_tensor(parts[1])


def _stored(features: Mapping[str, Tensor], trained: TrainedTokens, vocabulary: int) -> TopTokens:
    """The rows of trained tokens, of features [tokens, 1, width] each."""
    rows = (features[name].index_select(0, trained.indices).squeeze(1) for name in OF_STUDENT)
    ids, log_probs, rest = rows
    # Rows that pad a teacher's embedding are no tokens; those left are a distribution all the same.
    return TopTokens(ids, log_probs.masked_fill(ids >= vocabulary, float("-inf")), rest)


def install_distiller(
    student: Any, settings: KnowledgeSettings, vocabulary: int, teacher: Any | None
) -> None:
    """Let `finetune.forward_step` find what teaches `student`, as its attribute `distiller`.

    Args:
        student: unwrapped.
        settings: what is learned.
        vocabulary: tokens there really are.
        teacher: this rank's part of it; None: what is stored with the documents.
    """
    student.distiller = distiller = Distiller(settings, vocabulary, student, teacher)
    if teacher is not None and parallel_state.get_pipeline_model_parallel_world_size() > 1:
        student.beside = teacher.config.hidden_size
        student.set_input_tensor = distiller.set_input_tensor
