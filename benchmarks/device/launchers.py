"""The functions under test: Triton's on a card, the torch references in a dry run."""

from __future__ import annotations

from types import SimpleNamespace


def launchers(dry: bool) -> SimpleNamespace:
    """One namespace of functions with the signatures of `stars.kernels.triton`."""
    if dry:
        from stars.kernels.append_draft import append_draft_reference
        from stars.kernels.apply_penalties import apply_penalties_reference
        from stars.kernels.attention import attention_reference
        from stars.kernels.blend_logits import blend_logits_reference
        from stars.kernels.copy_rows import copy_rows_reference
        from stars.kernels.edit_logits import edit_logits_reference
        from stars.kernels.embedding import embedding_reference
        from stars.kernels.embedding_scaled import embedding_scaled_reference
        from stars.kernels.linear import linear_reference
        from stars.kernels.linear_normed import linear_normed_reference
        from stars.kernels.linear_residual import linear_residual_reference
        from stars.kernels.linear_swiglu import linear_swiglu_reference
        from stars.kernels.qkv_rope import qkv_rope_reference
        from stars.kernels.rms_norm import rms_norm_reference
        from stars.kernels.rope_write import rope_write_reference
        from stars.kernels.sample_step import sample_step_reference
        from stars.kernels.score import score_reference
        from stars.kernels.swiglu import swiglu_reference
        from stars.kernels.take_rows import take_rows_reference
        from stars.kernels.token_logprobs import token_logprobs_reference
        from stars.kernels.top_tokens import top_tokens_reference

        return SimpleNamespace(
            append_draft=append_draft_reference, apply_penalties=apply_penalties_reference,
            attention=attention_reference, blend_logits=blend_logits_reference, copy_rows=copy_rows_reference,
            edit_logits=edit_logits_reference, embedding=embedding_reference,
            embedding_scaled=embedding_scaled_reference, linear=linear_reference,
            linear_invariant=linear_reference, linear_normed=linear_normed_reference,
            linear_residual=linear_residual_reference, linear_swiglu=linear_swiglu_reference,
            qkv_rope=qkv_rope_reference,
            product=lambda x, weight, out, tile: linear_reference(x, weight, out), rms_norm=rms_norm_reference,
            rope_write=rope_write_reference,
            sample_step=lambda logits, lanes, filters=True, ended=None, cuts=True: sample_step_reference(
                logits.float(), lanes, filters, ended, cuts),
            score=score_reference, swiglu=swiglu_reference, take_rows=take_rows_reference,
            token_logprobs=token_logprobs_reference, top_tokens=top_tokens_reference)
    from stars.kernels.triton.append_draft import append_draft
    from stars.kernels.triton.apply_penalties import apply_penalties
    from stars.kernels.triton.attention import attention
    from stars.kernels.triton.blend_logits import blend_logits
    from stars.kernels.triton.copy_rows import copy_rows
    from stars.kernels.triton.edit_logits import edit_logits
    from stars.kernels.triton.embedding import embedding
    from stars.kernels.triton.linear import launch, linear, linear_invariant
    from stars.kernels.triton.rms_norm import rms_norm
    from stars.kernels.triton.rope_write import rope_write
    from stars.kernels.triton.sample_step import sample_step
    from stars.kernels.triton.score import score
    from stars.kernels.triton.skinny import embedding_scaled, linear_normed, linear_residual, linear_swiglu, qkv_rope
    from stars.kernels.triton.swiglu import swiglu
    from stars.kernels.triton.take_rows import take_rows
    from stars.kernels.triton.token_logprobs import token_logprobs
    from stars.kernels.triton.top_tokens import top_tokens

    return SimpleNamespace(
        append_draft=append_draft, apply_penalties=apply_penalties, attention=attention, blend_logits=blend_logits,
        copy_rows=copy_rows, edit_logits=edit_logits, embedding=embedding, embedding_scaled=embedding_scaled,
        linear=linear, linear_invariant=linear_invariant, linear_normed=linear_normed, linear_residual=linear_residual,
        linear_swiglu=linear_swiglu, product=launch, qkv_rope=qkv_rope, rms_norm=rms_norm, rope_write=rope_write,
        sample_step=sample_step, score=score, swiglu=swiglu, take_rows=take_rows, token_logprobs=token_logprobs,
        top_tokens=top_tokens)
