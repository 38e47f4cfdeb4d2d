"""What the widgets do under a reader's hands, in Chromium, without a kernel."""

import pytest

from tests.widgets import scene
from workbench.experiments.windows import window as steps_of
from workbench.widgets.code import CodeView
from workbench.widgets.controls import RunControls
from workbench.widgets.images import ImageStrip
from workbench.widgets.patch_map import PatchMap
from workbench.widgets.scrubber import StepScrubber
from workbench.widgets.tree import ComponentTree

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_app_looks_at_itself(open_widgets, theme):
    shown = open_widgets(scene.app(), live=True, theme=theme)
    shown.page.locator(".word", has_text="circle").click()
    shown.page.locator(".map-canvas").hover(position={"x": 250, "y": 50})
    shown.screenshot(f"app-{theme}")
    assert shown.page.locator(".wb").count() == 6


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_states_look_at_themselves(open_widgets, theme):
    error = {
        "title": "UnknownNameError",
        "text": "There is no site 'unet.mid_blok'. Did you mean 'unet.mid_block'?",
    }
    cards = [{"label": "source", "png": None}, {"label": "broken", "png": b"no png"}]
    progress = {"label": "source", "step": 7, "of": 20, "rate": 3.1, "left": 4.2}
    shown = open_widgets(
        [
            scene.controls(status="running", progress=progress),
            scene.controls(status="error", error=error, can_guide=False),
            [ComponentTree(), StepScrubber(), ImageStrip()],
            [PatchMap(), CodeView(problem="LoadError: the folder cannot be written")],
            [
                scene.patch_map(signed=True, busy=[2, 7], status="running", progress={"done": 36, "of": 140}),
                ImageStrip(cards=cards),
            ],
        ],
        live=True,
        theme=theme,
    )
    shown.page.get_by_text("unreadable").wait_for()
    assert shown.page.get_by_text("No model", exact=True).is_visible()
    shown.screenshot(f"states-{theme}")


@pytest.mark.parametrize("width", [420, 760, 1400])
def test_nothing_sticks_out(open_widgets, width):
    shown = open_widgets(scene.app(), live=True, width=width)
    assert shown.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shown.screenshot(f"app-{width}")


class TestScrubber:
    def test_arrows_change_every_canvas_and_the_readout(self, open_widgets):
        shown = open_widgets(scene.scrubber())
        canvases = shown.page.locator(".scrub-lane canvas").all()
        before = [shown.fingerprint(canvas) for canvas in canvases]
        shown.page.get_by_role("slider", name="Step", exact=True).focus()
        shown.page.keyboard.press("ArrowRight")
        after = [shown.fingerprint(canvas) for canvas in canvases]
        assert all(old != new for old, new in zip(before, after, strict=True))
        assert shown.page.locator(".scrub-readout").inner_text() == "step 8 · t 550 · σ 5.26"
        assert shown.model("scrubber", "step") == 8
        shown.page.keyboard.press("ArrowLeft")
        assert [shown.fingerprint(canvas) for canvas in canvases] == before

    @pytest.mark.parametrize(("key", "step"), [("Home", 0), ("End", 19), ("PageUp", 12), ("PageDown", 2)])
    def test_far_keys(self, open_widgets, key, step):
        shown = open_widgets(scene.scrubber())
        shown.page.get_by_role("slider", name="Step", exact=True).focus()
        shown.page.keyboard.press(key)
        assert shown.model("scrubber", "step") == step

    def test_arrows_work_from_a_word_too(self, open_widgets):
        shown = open_widgets(scene.scrubber())
        shown.page.locator(".word", has_text="red").focus()
        shown.page.keyboard.press("ArrowRight")
        assert shown.model("scrubber", "step") == 8

    def test_slider_follows_the_pointer(self, open_widgets):
        shown = open_widgets(scene.scrubber())
        rail = shown.page.get_by_role("slider", name="Step", exact=True)
        box = rail.bounding_box()
        rail.click(position={"x": box["width"] - 8, "y": 20})
        assert shown.model("scrubber", "step") == 19
        rail.click(position={"x": 8, "y": 20})
        assert shown.model("scrubber", "step") == 0

    def test_word_lays_its_map_over_its_lane_alone_and_off_again(self, open_widgets):
        shown = open_widgets(scene.scrubber())
        source, target = shown.page.locator(".scrub-lane canvas").all()[:2]
        before = [shown.fingerprint(source), shown.fingerprint(target)]
        chip = shown.page.locator(".word", has_text="red")
        chip.click()
        assert shown.fingerprint(source) != before[0]
        assert shown.fingerprint(target) == before[1]
        assert shown.model("scrubber", "selected_tokens") == [2]
        assert chip.get_attribute("aria-pressed") == "true"
        assert shown.page.locator(".scrub-legend").is_visible()
        chip.click()
        assert [shown.fingerprint(source), shown.fingerprint(target)] == before
        assert shown.model("scrubber", "selected_tokens") == []

    def test_shift_click_sums_words(self, open_widgets):
        shown = open_widgets(scene.scrubber())
        shown.page.locator(".word", has_text="red").click()
        alone = shown.page.locator(".scrub-legend").inner_text()
        shown.page.locator(".word", has_text="circle").click(modifiers=["Shift"])
        assert shown.model("scrubber", "selected_tokens") == [2, 3]
        assert shown.page.locator(".scrub-legend").inner_text() != alone

    def test_map_is_brightest_where_the_word_is(self, open_widgets):
        shown = open_widgets(scene.scrubber(step=19, selected_tokens=[3]))
        shown.page.get_by_label("Overlay strength").fill("100")
        canvas = shown.page.locator(".scrub-lane canvas").first
        red, green, _, _ = shown.pixel(canvas, 5.5 / 16, 9.5 / 16)
        assert min(red, green) > 200
        assert shown.pixel(canvas, 15.5 / 16, 15.5 / 16)[1] < 60

    def test_a_place_that_is_clicked_says_which_words_it_attends_to(self, open_widgets):
        shown = open_widgets(scene.scrubber(step=19))
        frame = shown.page.locator(".scrub-frame").first
        box = frame.bounding_box()
        position = {"x": box["width"] * 5.5 / 16, "y": box["height"] * 9.5 / 16}
        frame.click(position=position)
        assert shown.model("scrubber", "place") == [5.5 / 16, 9.5 / 16]
        assert "attends to circle" in shown.page.locator(".scrub-overlay").inner_text()
        shares = {
            chip.inner_text(): float(chip.evaluate("chip => chip.style.getPropertyValue('--share')"))
            for chip in shown.page.locator(".words-row:not(.words-special) .word").all()
        }
        assert shares["circle"] == 1
        assert shares["square"] < 0.5
        mark = shown.page.locator(".scrub-mark").first
        assert mark.is_visible()
        frame.press("Alt+ArrowRight")
        assert shown.model("scrubber", "place") == [6.5 / 16, 9.5 / 16]
        shown.page.keyboard.press("Escape")
        assert shown.model("scrubber", "place") == []
        assert not mark.is_visible()
        frame.press("Enter")
        assert shown.model("scrubber", "place") == [8.5 / 16, 8.5 / 16]
        frame.click(position={"x": box["width"] * 8.2 / 16, "y": box["height"] * 8.8 / 16})
        assert shown.model("scrubber", "place") == []
        assert shown.page.locator(".scrub-frame[tabindex]").count() == 1

    def test_layer_select_changes_the_map(self, open_widgets):
        shown = open_widgets(scene.scrubber(selected_tokens=[3]))
        canvas = shown.page.locator(".scrub-lane canvas").first
        before = shown.fingerprint(canvas)
        shown.page.get_by_label("Attention layer").select_option(label="mid_block.attentions.0")
        assert shown.model("scrubber", "layer") == 2
        assert shown.fingerprint(canvas) != before

    def test_kind_changes_the_picture(self, open_widgets):
        shown = open_widgets(scene.scrubber())
        canvas = shown.page.locator(".scrub-lane canvas").first
        before = shown.fingerprint(canvas)
        shown.page.get_by_role("radio", name="latents").click()
        assert shown.model("scrubber", "kind") == "latents"
        shown.until(lambda: shown.fingerprint(canvas) != before)

    def test_play_moves_and_pauses(self, open_widgets):
        shown = open_widgets(scene.scrubber(step=0))
        shown.page.get_by_role("button", name="Play").click()
        shown.page.locator(".scrub-readout", has_text="step 3").wait_for()
        shown.page.get_by_role("button", name="Pause").click()
        stopped = shown.model("scrubber", "step")
        shown.page.wait_for_timeout(300)
        assert shown.model("scrubber", "step") == stopped

    def test_scrubbing_sends_nothing_and_keeps_up(self, open_widgets):
        shown = open_widgets(scene.scrubber(step=0))
        shown.page.get_by_role("slider", name="Step", exact=True).focus()
        for _ in range(19):
            shown.page.keyboard.press("ArrowRight")
        assert shown.model("scrubber", "step") == 19
        assert shown.sent("scrubber") == []

    def test_lanes_that_arrive_later_are_shown(self, open_widgets):
        shown = open_widgets([StepScrubber(kinds=["latents"]), scene.scrubber()])
        assert shown.page.get_by_text("No steps yet").first.is_visible()
        shown.page.evaluate("workbenchModels[0].set('lanes', workbenchModels[1].get('lanes'))")
        canvas = shown.page.locator(".wb").first.locator("canvas").first
        shown.until(lambda: shown.pixel(canvas, 0.5, 0.5)[3] == 255)


class TestTree:
    def test_only_the_denoiser_is_unfolded(self, open_widgets):
        shown = open_widgets(scene.tree())
        names = shown.page.locator(".tree-name").all_inner_texts()
        assert names[:4] == ["text_encoder", "unet", "conv_in", "down_blocks"]
        assert "encoder" not in names

    def test_twisty_folds_and_unfolds(self, open_widgets):
        shown = open_widgets(scene.tree())
        row = shown.page.locator('[data-path="unet"]')
        row.locator(".tree-twisty").click()
        shown.settle()
        assert shown.page.locator('[data-path="unet.mid_block"]').count() == 0
        assert row.get_attribute("aria-expanded") == "false"
        row.locator(".tree-twisty").click()
        shown.settle()
        assert shown.page.locator('[data-path="unet.mid_block"]').count() == 1

    def test_filter_keeps_ancestors(self, open_widgets):
        shown = open_widgets(scene.tree())
        shown.page.get_by_label("Filter components").fill("mid_block.attentions.0")
        shown.settle()
        paths = shown.page.locator(".tree-row").evaluate_all("rows => rows.map(row => row.dataset.path)")
        assert paths == ["unet", "unet.mid_block", "unet.mid_block.attentions", "unet.mid_block.attentions.0"]
        shown.page.keyboard.press("Escape")
        shown.settle()
        assert shown.page.locator('[data-path="vae"]').count() == 1

    def test_filter_without_a_match_says_so(self, open_widgets):
        shown = open_widgets(scene.tree())
        shown.page.get_by_label("Filter components").fill("nothing like it")
        assert shown.page.get_by_text("No match").is_visible()

    def test_arrows_select_and_unfold(self, open_widgets):
        shown = open_widgets(scene.tree())
        shown.page.get_by_role("tree").focus()
        shown.page.keyboard.press("ArrowRight")
        shown.page.keyboard.press("ArrowRight")
        assert shown.model("tree", "selected") == "unet.mid_block.attentions"
        shown.page.keyboard.press("ArrowLeft")
        assert shown.model("tree", "selected") == "unet.mid_block"
        shown.page.keyboard.press("Home")
        assert shown.model("tree", "selected") == "text_encoder"

    @pytest.mark.parametrize(
        ("path", "code"),
        [
            ("unet.down_blocks.0.attentions.1", "model.unet.down_blocks[0].attentions[1].output"),
            ("unet.mid_block", "model.unet.mid_block.output"),
            ("unet.odd-name", 'model.site("unet.odd-name")'),
        ],
    )
    def test_copied_code_runs(self, open_widgets, path, code):
        widget = ComponentTree(
            nodes=[scene.node("unet", "UNet", 1, "component"), scene.node(path, "Block", 1)], selected=path
        )
        shown = open_widgets(widget)
        assert shown.page.locator(".tree-code code").inner_text() == code
        shown.page.evaluate("navigator.clipboard.writeText = async text => { window.copied = text }")
        shown.page.get_by_role("button", name="Copy code").click()
        assert shown.page.evaluate("copied") == code
        assert shown.page.get_by_role("button", name="Copy code").get_attribute("data-state") == "copied"

    def test_three_thousand_nodes_make_few_elements(self, open_widgets):
        nodes = [scene.node("unet", "UNet", 1, "component")]
        nodes += [scene.node(f"unet.block_{n}", "Block", n) for n in range(3000)]
        shown = open_widgets(ComponentTree(nodes=nodes))
        assert shown.page.locator(".tree-row").count() < 100
        took = shown.page.evaluate(
            """() => {
              const start = performance.now();
              const box = document.querySelector(".tree-search input");
              box.value = "block_29";
              box.dispatchEvent(new Event("input"));
              return performance.now() - start;
            }"""
        )
        assert took < 100


class TestPatchMap:
    def cell(self, shown, row, column):
        box = shown.page.locator(".map-canvas").bounding_box()
        return {
            "x": (column + 0.5) * box["width"] / scene.STEPS,
            "y": (row + 0.5) * box["height"] / len(scene.BLOCKS),
        }

    def test_click_selects_and_asks_for_the_cell(self, open_widgets):
        shown = open_widgets(scene.patch_map(), live=True)
        shown.page.locator(".map-canvas").click(position=self.cell(shown, 2, 11))
        assert shown.model("patch-map", "selected") == [2, 11]
        assert shown.sent("patch-map") == [{"kind": "cell", "row": 2, "column": 11}]

    def test_saved_page_selects_but_asks_nobody(self, open_widgets):
        shown = open_widgets(scene.patch_map())
        shown.page.locator(".map-canvas").click(position=self.cell(shown, 2, 11))
        assert shown.model("patch-map", "selected") == [2, 11]
        assert shown.sent("patch-map") == []

    def test_keys_move_and_enter_patches(self, open_widgets):
        shown = open_widgets(scene.patch_map(), live=True)
        shown.page.get_by_role("application").focus()
        for key in ["ArrowRight", "ArrowRight", "ArrowDown", "Enter"]:
            shown.page.keyboard.press(key)
        assert shown.sent("patch-map") == [{"kind": "cell", "row": 4, "column": 7}]

    def test_tooltip_says_site_steps_and_value(self, open_widgets):
        shown = open_widgets(scene.patch_map(holes=False), live=True)
        shown.page.locator(".map-canvas").hover(position=self.cell(shown, 3, 7))
        text = shown.page.locator(".map-tip").inner_text()
        value = scene.effects(holes=False)[3, 7]
        assert text.splitlines() == ["unet.mid_block", "steps 5–9", f"image difference {value:.3f}"]

    def test_a_map_of_fewer_steps_is_pointed_at_inside_alone(self, open_widgets):
        shown = open_widgets(scene.patch_map(selected=[]), live=True)
        shown.page.locator(".map-canvas").hover(position=self.cell(shown, 3, 14))
        shown.page.get_by_role("application").focus()
        shown.page.keyboard.press("End")
        shown.put("patch-map", "steps", 8)
        shown.settle()
        assert shown.page.locator(".map-tip").is_hidden()
        assert "· step 7 ·" in shown.page.locator(".map-readout").inner_text()

    def test_values_colour_their_cells(self, open_widgets):
        shown = open_widgets(scene.patch_map(holes=False, limit=0.85, selected=[]))
        canvas = shown.page.locator(".map-canvas")
        high = shown.pixel(canvas, 5.5 / scene.STEPS, 3.5 / 7)
        low = shown.pixel(canvas, 18.5 / scene.STEPS, 0.5 / 7)
        assert min(high[:2]) > 200
        assert low[1] < 60

    def test_window_is_chosen_and_drawn(self, open_widgets):
        shown = open_widgets(scene.patch_map(), live=True)
        shown.page.get_by_role("radio", name="to here").click()
        assert shown.sent("patch-map") == [{"kind": "window", "value": "to here"}]
        shown.page.locator(".map-canvas").hover(position=self.cell(shown, 0, 6))
        shown.settle()
        assert shown.page.locator(".map-axis .on").count() == 7

    @pytest.mark.parametrize("window", ["1", "quarter", "half", "to here", "from here"])
    def test_browser_and_python_agree_on_windows(self, open_widgets, window):
        shown = open_widgets(scene.patch_map(window=window), live=True)
        for column in (0, 7, 19):
            shown.page.locator(".map-canvas").hover(position=self.cell(shown, 1, column))
            shown.settle()
            ticks = shown.page.locator(".map-axis span").evaluate_all(
                "all => all.map(one => one.classList.contains('on'))"
            )
            covered = steps_of(window, column, scene.STEPS)
            assert [i for i, on in enumerate(ticks) if on] == list(covered)

    @pytest.mark.parametrize(
        ("sites", "labels"),
        [
            (["unet.down_blocks.0", "unet.mid_block"], ["down.0", "mid"]),
            (["unet.up_blocks.0.attn:output", "unet.up_blocks.1.attn:output"], ["0", "1"]),
            (["unet", "unet.mid_block"], ["unet", "unet.mid"]),
            (["unet.mid_block:output", "unet.mid_block:input"], ["mid", "mid_block:input"]),
            (["transformer.mid_block"], ["transformer.mid"]),
        ],
    )
    def test_row_labels_keep_what_tells_sites_apart(self, open_widgets, sites, labels):
        shown = open_widgets(PatchMap(sites=sites, steps=3))
        assert shown.page.locator(".map-site").all_inner_texts() == labels
        assert shown.page.locator(".map-site").first.get_attribute("title") == sites[0]

    def test_fill_and_stop(self, open_widgets):
        shown = open_widgets(scene.patch_map(), live=True)
        shown.page.get_by_role("button", name="Fill all").click()
        shown.put("patch-map", "status", "running")
        shown.page.get_by_role("button", name="Stop").click()
        assert shown.sent("patch-map") == [{"kind": "fill"}, {"kind": "stop"}]

    def test_busy_cell_has_a_spinner(self, open_widgets):
        shown = open_widgets(scene.patch_map())
        assert shown.page.locator(".map-spin").is_hidden()
        shown.put("patch-map", "busy", [1, 1])
        shown.settle()
        assert shown.page.locator(".map-spin").is_visible()


class TestControls:
    def test_run_by_button_and_by_key(self, open_widgets):
        shown = open_widgets(scene.controls(), live=True)
        shown.page.get_by_role("button", name="Run").click()
        shown.page.get_by_label("target").fill("a blue circle")
        shown.page.keyboard.press("Control+Enter")
        assert shown.sent("controls") == [{"kind": "run"}, {"kind": "run"}]
        assert shown.model("controls", "target") == "a blue circle"

    @pytest.mark.parametrize(
        ("field", "text"),
        [
            ("Seed", "-1"),
            ("Seed", "1.5"),
            ("Steps", "0"),
            ("Steps", ""),
            ("Guidance", "big"),
            ("from step", "1.5"),
        ],
    )
    def test_number_that_does_not_fit_is_said_and_not_sent(self, open_widgets, field, text):
        shown = open_widgets(scene.controls(), live=True)
        name = {"from step": "source_from"}.get(field, field.lower())
        before = shown.model("controls", name)
        shown.page.get_by_label(field, exact=True).fill(text)
        assert shown.page.get_by_text(f"{field} must be").is_visible()
        assert shown.page.get_by_role("button", name="Run").is_disabled()
        assert shown.model("controls", name) == before
        shown.page.keyboard.press("Control+Enter")
        assert shown.sent("controls") == []

    def test_running_shows_progress_and_stop(self, open_widgets):
        shown = open_widgets(scene.controls(), live=True)
        shown.put("controls", "status", "running")
        shown.put("controls", "progress", {"label": "source", "step": 7, "of": 20, "rate": 3.1, "left": 4.2})
        assert shown.page.get_by_text("source · 7 of 20 · 3.1 it/s · 4 s left").is_visible()
        assert shown.page.get_by_role("progressbar").get_attribute("aria-valuenow") == "7"
        shown.page.get_by_role("button", name="Stop").click()
        shown.put("controls", "status", "stopping")
        assert shown.page.get_by_role("button", name="Stopping").is_disabled()
        assert shown.sent("controls") == [{"kind": "stop"}]

    def test_error_is_shown_and_dismissed(self, open_widgets):
        shown = open_widgets(scene.controls(), live=True)
        shown.put("controls", "error", {"title": "InputError", "text": scene.HOSTILE})
        assert "<img src=x" in shown.page.get_by_role("alert").filter(has_text="InputError").inner_text()
        shown.page.get_by_role("button", name="Dismiss").click()
        assert shown.page.get_by_text("InputError").is_hidden()
        assert shown.sent("controls") == [{"kind": "dismiss"}]

    def test_without_a_kernel_nothing_runs(self, open_widgets):
        shown = open_widgets(scene.controls())
        assert shown.page.get_by_role("button", name="Run").is_disabled()
        assert shown.page.get_by_text("saved page, no kernel").is_visible()


class TestImagesAndCode:
    def test_click_enlarges_crisply_and_arrows_go_on(self, open_widgets):
        shown = open_widgets(scene.images())
        shown.page.get_by_role("button", name="Enlarge source").click()
        zoomed = shown.page.locator("dialog canvas")
        assert zoomed.bounding_box()["width"] >= 256
        assert zoomed.evaluate("one => getComputedStyle(one).imageRendering") == "pixelated"
        shown.page.keyboard.press("ArrowRight")
        assert shown.page.locator("dialog .wb-title").inner_text() == "target"
        shown.page.keyboard.press("Escape")
        assert shown.page.locator("dialog").is_hidden()

    def test_code_is_text_whatever_it_holds(self, open_widgets):
        shown = open_widgets(CodeView(code=scene.HOSTILE))
        assert shown.page.locator("pre code").text_content() == scene.HOSTILE
        assert shown.page.locator("pre img, pre script").count() == 0

    def test_code_is_coloured_and_complete(self, open_widgets):
        shown = open_widgets(scene.code())
        assert shown.page.locator("pre code").text_content() == scene.CODE
        assert shown.page.locator(".py-keyword").first.inner_text() == "import"
        assert "# the steps covered" in shown.page.locator(".py-comment").all_inner_texts()
        assert shown.page.locator(".py-def").all_inner_texts() == ["patched"]

    def test_export_names_the_format(self, open_widgets):
        shown = open_widgets(scene.code(), live=True)
        shown.page.get_by_label("Export format").select_option("JSON")
        shown.page.get_by_role("button", name="Export").click()
        assert shown.sent("code") == [{"kind": "export", "format": "JSON"}]

    def test_hostile_text_runs_nowhere(self, open_widgets):
        cards = [{"label": scene.HOSTILE, "png": None, "caption": scene.HOSTILE, "badge": scene.HOSTILE}]
        token = {"text": scene.HOSTILE, "index": 0, "special": False}
        shown = open_widgets(
            [
                scene.controls(source=scene.HOSTILE, model_name=scene.HOSTILE),
                ImageStrip(cards=cards, note=scene.HOSTILE),
                scene.scrubber(attention={}, words=[token]),
                PatchMap(sites=[scene.HOSTILE], steps=3, source_label=scene.HOSTILE),
                ComponentTree(nodes=[scene.node("a", scene.HOSTILE, 1)]),
            ]
        )
        shown.page.wait_for_timeout(200)
        assert shown.page.locator("img").count() == 0


def test_controls_of_a_model_without_words_have_two_seeds(open_widgets):
    controls = RunControls(seed=5, source_seed=6, can_prompt=False, can_guide=False, can_step=False)
    page = open_widgets([[controls]], live=True).page
    assert page.locator("textarea:visible").count() == 0
    seeds = page.locator(".controls-prompt").get_by_label("Seed", exact=True)
    assert [each.input_value() for each in seeds.all()] == ["6", "5"]
    assert page.get_by_label("from step").is_hidden()
    assert page.get_by_label("Steps").is_disabled()
    seeds.first.fill("9")
    page.wait_for_function("workbenchModels[0].get('source_seed') === 9")


def test_a_source_with_its_own_seed_has_a_field_for_it(open_widgets):
    worded = {"source": "a red circle", "target": "a blue circle"}
    both = open_widgets([[RunControls(**worded, source_seed=3)], [RunControls(**worded)]], live=True).page
    first, second = both.locator(".wb-controls").all()
    assert first.get_by_label("Seed", exact=True).count() == 2
    assert second.locator(".controls-prompt").get_by_label("Seed", exact=True).count() == 0
    assert both.locator("textarea:visible").count() == 4
