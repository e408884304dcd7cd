// Keeps the newest text in view until the user scrolls up, and again after scrolling back to the end.

const NEAR = 48; // pixels from the end that still count as the end

export class Follower {
  /** `scroller` contains the text; `button` scrolls to the end, and is visible only away from it. */
  constructor(scroller, button) {
    Object.assign(this, { scroller, button, following: true, top: 0 });
    scroller.addEventListener('scroll', () => this.onScroll(), { passive: true });
    button.addEventListener('click', () => this.toEnd());
    new ResizeObserver(() => this.keepUp()).observe(scroller); // the box shrinks when a keyboard opens or the input grows
  }

  get atEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR;
  }

  onScroll() {
    const { scrollTop } = this.scroller;
    // Only scrolling up stops following; text that is added below does not scroll.
    if (this.atEnd) this.following = true;
    else if (scrollTop < this.top) this.following = false;
    this.top = scrollTop;
    this.showButton();
  }

  /** Called after the text has changed. */
  keepUp() {
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.top = this.scroller.scrollTop;
    this.showButton();
  }

  toEnd() {
    this.following = true;
    this.keepUp();
  }

  showButton() {
    this.button.hidden = this.atEnd || this.following;
  }
}
