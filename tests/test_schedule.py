"""Reading compiled programs: what is hidden behind what, how often."""

import pytest

from experiments.measure import schedule

HEADER = "HloModule jit_step, is_scheduled=true\n\n"
PRODUCT = (
  "  %product.{0} = f32[64,32]{{1,0:T(8,128)}} convolution(%a.{0}, %b.{0}), "
  "dim_labels=bf_io->bf\n"
)


def one(text):
  [found] = schedule.collectives(HEADER + text)
  return found


def test_a_plain_gather_keeps_the_chip_waiting():
  found = one("""
ENTRY %main (p: bf16[8,16]) -> bf16[32,16] {
  %p = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.7 = bf16[32,16]{1,0:T(8,128)(2,1)} all-gather(%p), \
channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}, \
metadata={op_name="jit(step)/jvp(trunk)/while/body/dot"}
}
""")
  # Three of four parts come from others.
  assert found == schedule.Collective(
    "all-gather", "trunk forward", 32 * 16 * 2 * 3 // 4, 1, 0
  )


def permute(between):
  return one(f"""
ENTRY %main (p: f32[5,7]) -> f32[5,7] {{
  %p = f32[5,7]{{1,0}} parameter(0)
  %collective-permute-start.1 = (f32[5,7]{{1,0}}, f32[5,7]{{1,0}}, \
u32[]{{:S(2)}}, u32[]{{:S(2)}}) collective-permute-start(%p), channel_id=1, \
source_target_pairs={{{{0,1}},{{1,0}}}}
{between}  ROOT %collective-permute-done.1 = f32[5,7]{{1,0}} \
collective-permute-done(%collective-permute-start.1)
}}
""")


def test_a_permute_is_hidden_by_a_product_in_between():
  assert permute(PRODUCT.format(1)).hidden
  add = "  %add.1 = f32[5,7]{1,0} add(%p, %p)\n"
  assert not permute(add).hidden
  assert permute("").received == 5 * 7 * 4


def test_a_start_without_an_end_is_an_error():
  with pytest.raises(ValueError, match="nothing waits for all-gather-start.1"):
    one("""
ENTRY %main (p: f32[2]) -> f32[4] {
  %p = f32[2]{0} parameter(0)
  ROOT %all-gather-start.1 = (f32[2]{0}, f32[4]{0}) all-gather-start(%p), \
channel_id=1, replica_groups={{0,1}}, dimensions={0}
}
""")


def test_a_gather_that_is_started_and_awaited():
  found = one("""
ENTRY %main (p: f32[2]) -> f32[4] {
  %p = f32[2]{0} parameter(0)
  %all-gather-start.1 = (f32[2]{0}, f32[4]{0}) all-gather-start(%p), \
channel_id=1, replica_groups={{0,1}}, dimensions={0}
  ROOT %all-gather-done.1 = f32[4]{0} all-gather-done(%all-gather-start.1)
}
""")
  assert (found.received, found.behind) == (4 * 4 // 2, 0)


def test_an_unknown_group_is_an_error():
  with pytest.raises(ValueError, match="cannot read the chips"):
    one("""
ENTRY %main (p: f32[2]) -> f32[4] {
  %p = f32[2]{0} parameter(0)
  ROOT %all-gather.1 = f32[4]{0} all-gather(%p), channel_id=1, \
replica_groups={}, dimensions={0}
}
""")


def test_a_kernel_hides_too():
  kernel = (
    "  %k = f32[5,7]{1,0} custom-call(%p), "
    'custom_call_target="tpu_custom_call"\n'
  )
  assert permute(kernel).hidden
  assert not permute(kernel.replace("tpu_custom_call", "AllocateBuffer")).hidden


def test_a_loop_counts_its_iterations_and_the_loops_around_it():
  found = one("""
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}

%inner_body (s: (s32[], f32[9])) -> (s32[], f32[9]) {
  %s = (s32[], f32[9]{0}) parameter(0)
  %v = f32[9]{0} get-tuple-element(%s), index=1
  %all-reduce.1 = f32[9]{0} all-reduce(%v), channel_id=1, \
replica_groups=[2,4]<=[8], to_apply=%add, \
metadata={op_name="jit(step)/jvp(heads)/while/body/sum"}
  ROOT %t = (s32[], f32[9]{0}) tuple(%s, %all-reduce.1)
}

%inner_cond (s.1: (s32[], f32[9])) -> pred[] {
  %c = s32[]{:T(128)} constant(5)
  %s.1 = (s32[], f32[9]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}

%outer_body (s.2: (s32[], f32[9])) -> (s32[], f32[9]) {
  %s.2 = (s32[], f32[9]{0}) parameter(0)
  ROOT %while.1 = (s32[], f32[9]{0}) while(%s.2), condition=%inner_cond, \
body=%inner_body
}

%outer_cond (s.3: (s32[], f32[9])) -> pred[] {
  %c.3 = s32[] constant(3)
  %s.3 = (s32[], f32[9]{0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%s.3), index=0
  ROOT %lt.3 = pred[] compare(%i.3, %c.3), direction=LT
}

ENTRY %main (p: (s32[], f32[9])) -> (s32[], f32[9]) {
  %p = (s32[], f32[9]{0}) parameter(0)
  ROOT %while.2 = (s32[], f32[9]{0}) while(%p), condition=%outer_cond, \
body=%outer_body
}
""")
  assert (found.kind, found.part, found.times) == ("all-reduce", "heads", 15)
  assert found.received == 2 * 9 * 4 * 3 // 4  # reduced, then gathered


def test_iterations_that_cannot_be_counted_are_an_error():
  text = """
%body (s: (s32[])) -> (s32[]) {
  ROOT %s = (s32[]) parameter(0)
}

%cond (s.1: (s32[])) -> pred[] {
  %s.1 = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s.1), index=0
  ROOT %lt = pred[] compare(%i, %i), direction=LT
}

ENTRY %main (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  ROOT %while.1 = (s32[]) while(%p), condition=%cond, body=%body
}
"""
  with pytest.raises(ValueError, match="iterations of the loop with cond"):
    schedule.collectives(HEADER + text)


@pytest.mark.parametrize("between", ["", PRODUCT.format(2)])
def test_a_gather_on_another_core(between):
  """SparseCore: started, fed and awaited by instructions of their own."""
  found = one(f"""
%gather (q: f32[4]) -> f32[8] {{
  %q = f32[4]{{0}} parameter(0)
  ROOT %all-gather.1 = f32[8]{{0}} all-gather(%q), channel_id=2, \
replica_groups=mesh['data'=2,'model'=4] {{'data'}}, dimensions={{0}}, \
metadata={{op_name="jit(step)/transpose(jvp(trunk))/while/body/convert"}}
}}

ENTRY %main (p: f32[4]) -> f32[8] {{
  %p = f32[4]{{0}} parameter(0)
  %g-start = ((), (), s32[]) async-start(), \
async_execution_thread="sparsecore", calls=%gather
  %g-update = ((f32[4]{{0}}), f32[8]{{0}}, s32[]) async-update(%g-start, %p)
{between}  ROOT %g-done = f32[8]{{0}} async-done(%g-update)
}}
""")
  assert (found.kind, found.part) == ("all-gather", "trunk backward")
  assert found.received == 8 * 4 // 2
  assert found.hidden == bool(between)


def test_a_gather_fused_with_products_is_counted_once():
  """v5e: a start, fusions that carry it on, and a done, of one channel."""
  step = 'backend_config={"async_collective_fusion_config":{"flag_start":"2"}}'
  found = one(f"""
%start (q: f32[4]) -> (f32[4], f32[8]) {{
  %q = f32[4]{{0}} parameter(0)
  %all-gather.1 = f32[8]{{0}} all-gather(%q), channel_id=2, \
replica_groups={{{{0,1}}}}, {step}
  ROOT %c = (f32[4]{{0}}, f32[8]{{0}}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}}

%carry (q.1: f32[4]) -> f32[8] {{
  %q.1 = f32[4]{{0}} parameter(0)
  %all-gather.2 = f32[8]{{0}} all-gather(%q.1), channel_id=2, \
replica_groups={{{{0,1}}}}, {step}
{PRODUCT.format(3)}  ROOT %c.1 = f32[8]{{0}} custom-call(%all-gather.2), \
custom_call_target="AsyncCollectiveStep"
}}

%done (q.2: f32[4]) -> f32[8] {{
  %q.2 = f32[4]{{0}} parameter(0)
  %all-gather.3 = f32[8]{{0}} all-gather(%q.2), channel_id=2, \
replica_groups={{{{0,1}}}}, {step}
  ROOT %c.2 = f32[8]{{0}} custom-call(%all-gather.3), \
custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (p: f32[4]) -> f32[8] {{
  %p = f32[4]{{0}} parameter(0)
  %async-collective-start = (f32[4]{{0}}, f32[8]{{0}}) fusion(%p), \
kind=kCustom, calls=%start
  %fusion.1 = f32[8]{{0}} fusion(%p), kind=kOutput, calls=%carry
  ROOT %async-collective-done = f32[8]{{0}} fusion(%p), kind=kCustom, \
calls=%done
}}
""")
  assert (found.kind, found.received, found.behind) == ("all-gather", 16, 1)


def test_a_sum_of_which_a_slice_is_kept_is_a_reduce_scatter():
  found = one("""
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}

%all-reduce-scatter.2 (q: f32[8]) -> f32[2] {
  %q = f32[8]{0} parameter(0)
  %all-reduce.1 = f32[8]{0} all-reduce(%q), channel_id=2, \
replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %d = f32[2]{0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={2}
}

ENTRY %main (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  ROOT %fusion.1 = f32[2]{0} fusion(%p), kind=kCustom, \
calls=%all-reduce-scatter.2, metadata={op_name="jit(step)/update/sub"}
}
""")
  assert (found.kind, found.received) == ("reduce-scatter", 8 * 4 * 3 // 4)


def test_another_text_is_refused():
  with pytest.raises(ValueError, match="not a scheduled HLO module"):
    schedule.collectives("HloModule jit_step\n")
