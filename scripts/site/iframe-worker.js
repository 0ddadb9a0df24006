// The site's search runs in a worker, which browsers refuse to pages that are read as files: there a hidden frame
// stands in for it. A worker gets and gives copies; the search writes into the query it gets, so without a copy each key
// would empty the box.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inside = this.frame.contentWindow
      inside.postMessage = data => this.onmessage && this.onmessage({ data: structuredClone(data) })
      const script = inside.document.createElement("script")
      script.src = new URL(url, location.href).href
      this.ready = new Promise((resolve, reject) => {
        script.onload = () => resolve(inside)
        script.onerror = reject
      })
      this.ready.catch(error => this.onerror && this.onerror(error))
      inside.document.head.append(script)
    }
    postMessage(data) {
      const copy = structuredClone(data)
      this.ready.then(inside => inside.dispatchEvent(new inside.MessageEvent("message", { data: copy })), () => {})
    }
    terminate() {
      this.frame.remove()
    }
  }
}
