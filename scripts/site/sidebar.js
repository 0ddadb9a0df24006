// The navigation is longer than a window: bring the page that is read into sight.
addEventListener("load", () => {
  const here = document.querySelector(".md-sidebar--primary .md-nav__link--active")
  const bar = here && here.closest(".md-sidebar__scrollwrap")
  if (bar && bar.scrollHeight > bar.clientHeight) {
    bar.scrollTop += here.getBoundingClientRect().top - bar.getBoundingClientRect().top - bar.clientHeight / 3
  }
})
