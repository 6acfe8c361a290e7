// A picture's file, as a data URL in props.value; Python empties it once the picture is taken.
const drop = element.querySelector(".drop"), input = element.querySelector("input");
const said = element.querySelector(".said"), forget = element.querySelector(".forget");
const most = props.most;

function take(file) {
  if (!file) return;
  if (file.size > most) { said.textContent = file.name + " is larger than " + (most >> 20) + " MiB; make it smaller"; return; }
  const reader = new FileReader();
  reader.onload = () => { said.textContent = file.name; forget.hidden = false; props.value = reader.result; trigger("upload"); };
  reader.onerror = () => { said.textContent = file.name + " cannot be read"; };
  reader.readAsDataURL(file);
}
input.addEventListener("change", () => take(input.files[0]));
drop.addEventListener("dragover", event => { event.preventDefault(); drop.classList.add("over"); });
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", event => { event.preventDefault(); drop.classList.remove("over"); take(event.dataTransfer.files[0]); });
forget.addEventListener("click", () => { said.textContent = ""; input.value = ""; forget.hidden = true; trigger("clear"); });
